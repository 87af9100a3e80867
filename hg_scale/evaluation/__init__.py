"""What a trained model is worth and what it writes: scores, texts, images, reports."""
