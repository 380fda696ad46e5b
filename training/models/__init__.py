"""Model families by name: each builds from its recipe, embeds a chunk and gives its separable sums."""
