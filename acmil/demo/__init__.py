"""The demo: real tissue texture with planted lesions, made to test the pipeline; of no medical meaning."""
