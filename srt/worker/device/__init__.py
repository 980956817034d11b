"""The worker's engine for a GPU: what rows hold lives on the device, and no step waits for it."""
