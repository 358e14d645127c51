"""What minima look like: landscapes, Hessians, sharpness. Here, and only here, networks are evaluated."""
