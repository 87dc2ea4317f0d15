"""What may be done to a clip before a model learns from it: to its waveform, and to its log-mel."""
