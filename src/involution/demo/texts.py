"""Texts of the web demo, by language: the browser's, or else English."""

# Keys must differ from those of Gradio's own texts, such as "image".
TEXTS = {
    "en": {
        "introduction": "# Involution\n\n"
        "A convolution applies the same kernel at every position of an image; an involution "
        "generates a kernel for each position, from the features there. Upload an image: these "
        "networks classify it and show the kernels that they generate.",
        "input_image": "Image: drop, paste or upload",
        "examples": "Or an example, a drawing:",
        "airplane": "Airplane",
        "ship": "Ship",
        "truck": "Truck",
        "classes": "**These networks know the following classes only**, and name one of them for "
        "every image, whatever it shows:",
        "card": "Model card",
        "heat_maps": "Heat maps",
        "heat_maps_help": "Click a point in any image to see the kernels generated there.",
        "kernels": "Kernels at a point",
        "kernels_help": "Click a point in any image, or set its coordinates: every involution's "
        "window and generated kernel there.",
        "row": "Row (0: top, 1: bottom)",
        "column": "Column (0: left, 1: right)",
    },
    "ko": {
        "introduction": "# 인볼루션\n\n"
        "합성곱은 이미지의 모든 위치에 같은 커널을 적용합니다. 인볼루션은 각 위치의 특징으로부터 "
        "그 위치의 커널을 생성합니다. 이미지를 올리면 네트워크가 분류 결과와 함께 생성한 커널을 "
        "보여 줍니다.",
        "input_image": "이미지: 끌어 놓기, 붙여 넣기 또는 올리기",
        "examples": "또는 예시 그림:",
        "airplane": "비행기",
        "ship": "배",
        "truck": "트럭",
        "classes": "**이 네트워크는 다음 클래스만 알며**, 무엇을 찍은 이미지든 그중 하나로 "
        "답합니다:",
        "card": "모델 카드",
        "heat_maps": "히트맵",
        "heat_maps_help": "이미지의 한 점을 누르면 그 점에서 생성된 커널을 볼 수 있습니다.",
        "kernels": "한 점의 커널",
        "kernels_help": "이미지의 한 점을 누르거나 좌표를 정하면, 그 점에서 각 인볼루션이 보는 "
        "윈도와 생성한 커널을 보여 줍니다.",
        "row": "행 (0: 맨 위, 1: 맨 아래)",
        "column": "열 (0: 맨 왼쪽, 1: 맨 오른쪽)",
    },
}
