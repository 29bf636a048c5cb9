"""Why gradients explode: where in the program, from what cause, and what to do."""
