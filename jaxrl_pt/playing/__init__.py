"""`jaxrl-pt play --workdir W`: a model of a game played in a browser, beside the true game."""
