"""Colors of the figures and of the demo: they keep their order in grayscale and for color-blind
readers."""

# Okabe and Ito's.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
TRAIN, TEST = PALETTE[:2]
# Matplotlib color maps: of heat maps, and of values around 0.
SEQUENTIAL_CMAP, DIVERGING_CMAP = "cividis", "PuOr"
