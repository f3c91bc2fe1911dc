"""The demo: a real model reads a long prompt with dense and with sparse attention (`scrimp demo`)."""
