fn main() -> std::process::ExitCode {
    novastor::cli::main()
}
