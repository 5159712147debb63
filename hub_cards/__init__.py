"""What a merged model is on the Hub: its card, and how it gets there."""
