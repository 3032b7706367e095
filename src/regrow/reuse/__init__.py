"""What is kept between calls of the denoiser."""
