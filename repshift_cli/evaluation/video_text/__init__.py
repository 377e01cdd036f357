"""Video-text retrieval and video question answering."""
