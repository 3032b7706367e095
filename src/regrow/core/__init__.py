"""What is decided for each call and site, what sites keep, and the hook that carries it out."""
