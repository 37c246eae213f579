"""Sound: codec tokens to mel frames (DiT, an ODE solved by evaluations) to samples (BigVGAN), in exact windows."""
