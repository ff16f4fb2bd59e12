"""What trained models are worth: scores of the prior, yardsticks of the codec, windows."""
