"""Sparse autoencoders on what a model computes, and on what an adapter changes there; through sae-lens."""
