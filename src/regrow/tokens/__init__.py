"""Pure functions on tokens: grids, scores, selections, recoveries. They know no model and no diffusers."""
