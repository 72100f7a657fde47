"""Colors of figures and demo; scales keep their order in grayscale and for color-blind readers."""

# The palette of Okabe and Ito.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAIN, TEST = PALETTE[:2]
# Matplotlib color maps: of heat maps, and of values around 0.
SEQUENTIAL_CMAP, DIVERGING_CMAP = "cividis", "PuOr"
