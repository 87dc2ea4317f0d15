"""Trained models for runtimes without PyTorch: classifiers for ONNX, recognisers for CTranslate2."""
