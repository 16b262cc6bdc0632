"""The worker's side: the model, the paged cache and the store's tensors; it never learns of queues."""
