"""How long the stages take, beside the least they could take."""
