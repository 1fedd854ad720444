# bash completion for oncefs. The program itself says what can come next, so
# this stays true when it changes.
_oncefs() {
	local cur=${COMP_WORDS[COMP_CWORD]} program=${COMP_WORDS[0]} kind line
	[[ $cur == = ]] && cur= # bash cuts --option=value in three
	type -P "$program" >/dev/null || program=oncefs
	COMPREPLY=()
	{
		read -r kind
		case $kind in
		words)
			while IFS= read -r line; do COMPREPLY+=("${line%%$'\t'*}"); done
			;;
		files)
			compopt -o filenames 2>/dev/null
			mapfile -t COMPREPLY < <(compgen -f -- "$cur")
			;;
		directories)
			compopt -o filenames 2>/dev/null
			mapfile -t COMPREPLY < <(compgen -d -- "$cur")
			;;
		users) mapfile -t COMPREPLY < <(compgen -u -- "$cur") ;;
		groups) mapfile -t COMPREPLY < <(compgen -g -- "$cur") ;;
		esac
	} < <("$program" internal-complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)
}
complete -F _oncefs oncefs
