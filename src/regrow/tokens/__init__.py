"""Pure functions on tokens: grids, scores, selections, recoveries; independent of models and diffusers."""
