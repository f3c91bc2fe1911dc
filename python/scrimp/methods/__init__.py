"""The methods: what each paper skips, built on the ops."""
