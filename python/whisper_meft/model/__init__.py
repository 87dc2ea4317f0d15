"""The Hugging Face model (encoder, what a method trains, head); saving, loading, converting, merging."""
