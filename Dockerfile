# The service in one image. glibc (slim), since the embedded server has no musl build.
FROM python:3.13-slim AS build
WORKDIR /src
RUN python -m venv /opt/imagegen
COPY requirements.lock requirements-build.lock ./
RUN python -m pip install --no-cache-dir --require-hashes -r requirements-build.lock \
    && /opt/imagegen/bin/pip install --no-cache-dir --require-hashes -r requirements.lock
COPY pyproject.toml README.md LICENSE ./
COPY imagegen imagegen
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
    && /opt/imagegen/bin/pip install --no-cache-dir --no-deps --no-index /wheels/*.whl

FROM python:3.13-slim
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin imagegen \
    && install -d -o imagegen -g imagegen -m 0700 /data
COPY --from=build /opt/imagegen /opt/imagegen
ENV PATH=/opt/imagegen/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    DATA_DIR=/data
WORKDIR /data
USER imagegen
VOLUME ["/data"]
EXPOSE 3000
HEALTHCHECK --interval=30s --timeout=5s --start-period=20s --retries=3 \
    CMD ["python", "-m", "imagegen.health_check"]
CMD ["imagegen"]
