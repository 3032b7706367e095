"""The decisions for each call and site, what sites keep, and the hook that carries decisions out."""
