"""The frozen Whisper encoder as a stream of hidden states, whole, in chunks, compiled or in 8 bits."""
