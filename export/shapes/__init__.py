"""The embedded model: a small text-to-image latent diffusion model that this project trains on its own images."""
