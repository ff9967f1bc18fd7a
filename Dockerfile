# docker build -t loraplex . && docker run -p 8000:8000 loraplex                 the demo
# docker run -p 8000:8000 -v loraplex:/var/lib/loraplex -v ./my:/srv/my:ro loraplex serve --config /srv/my/loraplex.toml
# On a GPU: --gpus all, and -v triton:/home/loraplex/.triton keeps compiled kernels for the next start.
# docker stop -t 40: seconds, more than server.drain_seconds, or streams are cut that would have finished.
FROM python:3.11-slim AS base
# A compiler: for the kernels in C, and on a GPU for what launches Triton's, which it builds where it runs.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# What is large: for as long as pyproject.toml stays the same it is neither installed again nor fetched again.
FROM base AS dependencies
WORKDIR /src
COPY pyproject.toml .
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['postgres'], sep='\n')" > requirements.txt
RUN python -m venv /opt/loraplex && /opt/loraplex/bin/pip install --no-cache-dir -r requirements.txt

FROM dependencies AS build
COPY . .
RUN /opt/loraplex/bin/pip install --no-cache-dir --no-deps --no-warn-script-location --prefix /opt/installed .

FROM base
ENV PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1 PATH=/opt/loraplex/bin:$PATH
RUN useradd --create-home --uid 10001 loraplex && install -d -o loraplex -g loraplex -m 700 /var/lib/loraplex
USER loraplex
RUN mkdir /home/loraplex/.triton
COPY --from=dependencies /opt/loraplex /opt/loraplex
COPY --from=build /opt/installed /opt/loraplex
# What outlives the container. Settings that name a file without a directory mean one in here.
VOLUME /var/lib/loraplex
WORKDIR /var/lib/loraplex
EXPOSE 8000
# LORAPLEX_URL says where the server is, to commands in the container as well, if settings choose another port. A large
# model loads for long. Until the first success, failures do not count for the length of the start period.
HEALTHCHECK --start-period=30m --interval=10s --timeout=3s \
    CMD python -c "import os, urllib.request as web; \
    web.urlopen(os.environ.get('LORAPLEX_URL', 'http://127.0.0.1:8000') + '/health', timeout=2)"
ENTRYPOINT ["loraplex"]
CMD ["demo", "--host", "0.0.0.0"]
