"""What a trained model can do. `python -m smaug.evaluate RUN` gives a run's numbers again."""
