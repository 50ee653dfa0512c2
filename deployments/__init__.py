"""What an outside tool takes by path: the app that serves a model on Modal."""
