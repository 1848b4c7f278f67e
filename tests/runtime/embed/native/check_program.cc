// Reads programs from the standard input, each after its size in 4 bytes, and prints what the reader says of each.
#include <cstdint>
#include <cstdio>
#include <string>

#include "error.h"
#include "program.h"

int main() {
    for (std::uint32_t size; std::fread(&size, sizeof size, 1, stdin) == 1;) {
        std::string content(size, '\0');
        if (size && std::fread(content.data(), 1, size, stdin) != size) return 2;
        try {
            driffusion::Program::parse(content);
            std::puts("OK");
        } catch (const driffusion::Error &error) {
            std::printf("%s %s\n", driffusion_status_name(error.status()), error.what());
        }
    }
}
