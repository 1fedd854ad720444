# fish completion for oncefs. The program itself says what can come next, so this
# stays true when it changes.
function __oncefs_complete
    set -l words (commandline -opc) (commandline -ct)
    set -l program $words[1]
    command -sq $program; or set program oncefs
    set -l answer ($program internal-complete $words[2..] 2>/dev/null)
    set -l current $words[-1]
    set -l option (string match -r '^--[^=]+=' -- $current; or echo)
    set current (string replace -r '^--[^=]+=' '' -- $current)
    switch $answer[1]
        case words
            printf '%s\n' $option$answer[2..]
        case files
            printf '%s\n' $option(__fish_complete_path $current)
        case directories
            printf '%s\n' $option(__fish_complete_directories $current)
        case users
            printf '%s\n' $option(__fish_complete_users)
        case groups
            printf '%s\n' $option(__fish_complete_groups)
    end
end
complete -c oncefs -f -a '(__oncefs_complete)'
