"""The kit that brings vLLM and this repository to a bare GPU machine and tries them there."""
