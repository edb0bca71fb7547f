"""What a rank holds of parameters, and how gradients are reduced."""
