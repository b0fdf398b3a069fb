"""Weights of others to ours and back; files are safetensors and JSON, never pickles."""
