"""How fast: stages beside their floors, rivals beside CFGen, in one interleaved run."""
