"""`headrace init`: configs that fit a model, one's own data and this machine."""
