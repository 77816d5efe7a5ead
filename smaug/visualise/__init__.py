"""One clip as a trained model treats it, as a picture and as a page: `python -m smaug.visualise RUN CLIP`."""
