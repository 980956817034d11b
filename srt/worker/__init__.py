"""The process that holds weights and KV memory; it obeys step plans and decides nothing."""
