"""CompressKV inside vLLM: each request's prompt cache is cut to its budget at the end of prefill.

vLLM is imported only by the modules that subclass it; the rest of compresskv never imports this package.
"""
