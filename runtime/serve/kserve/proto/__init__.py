"""Messages of the Open Inference Protocol, generated from `inference.proto` by grpcio-tools."""
