"""Fills topics of two brokers by librdkafka, and keeps the second one, which is a part of it, until its input is closed.

The arguments are the address of the first broker; the line that is printed is that of the second.
"""

import sys

from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic

COMPRESSIONS = ["none", "gzip", "snappy", "lz4", "zstd"]
PARTITIONS = 4
RECORDS = 1000


def fill(servers):
    for compression in COMPRESSIONS:
        # Records are gathered into batches, so that there is something to compress.
        producer = Producer({"bootstrap.servers": servers, "compression.type": compression, "linger.ms": 50})
        for n in range(RECORDS):
            producer.produce(
                compression,
                partition=n % PARTITIONS,
                key=b"key %d" % (n % 7),
                value=b'{"n": %d, "text": "%s"}' % (n, b"again and " * (n % 50)),
                headers=[("n", str(n)), ("nothing", None)],
            )
        left = producer.flush(30)
        if left:
            sys.exit(f"{servers} took all but {left} records of {compression}")


def main():
    first = sys.argv[1]
    topics = [NewTopic(name, num_partitions=PARTITIONS, replication_factor=1) for name in COMPRESSIONS]
    admin = AdminClient({"bootstrap.servers": first})
    for made in admin.create_topics(topics).values():
        made.result(30)
    fill(first)
    # Three brokers in this process, that make topics of four partitions when they are asked for them.
    second = Producer({"bootstrap.servers": "nobody", "test.mock.num.brokers": 3})
    servers = ",".join(f"{broker.host}:{broker.port}" for broker in second.list_topics(timeout=30).brokers.values())
    fill(servers)
    print(servers, flush=True)
    sys.stdin.read()


main()
