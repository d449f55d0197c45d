"""Statistics of a model in training, in torch alone; `callbacks` decides when and logs them."""
