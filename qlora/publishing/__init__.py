"""What leaves a run: folders that need nothing else, their manifests, model cards, and repositories on the Hub."""
