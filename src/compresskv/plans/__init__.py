"""Plans: what is kept of one prompt, decided beforehand."""
