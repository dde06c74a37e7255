"""The gRPC endpoint, an extra: `orcaserve[grpc]`. Nothing else imports it, and only this imports grpc."""
