"""Interleaved documents: pages and sentence lists with their pictures become texts and images in one order."""
