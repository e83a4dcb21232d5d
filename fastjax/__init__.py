"""Fine-tunes Hugging Face language models on CUDA GPUs with JAX."""
