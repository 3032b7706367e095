"""Training of what methods learn: TokenCache's predictor and its refinement, Learning-to-Cache's router.

It stands on the public surface; nothing else of the package needs it.
"""
