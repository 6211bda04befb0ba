"""How a whole model is treated: outliers put in by hand; calibration and the block-by-block loop later."""
