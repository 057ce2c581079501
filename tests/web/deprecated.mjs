/** Prints each use of something deprecated in web/: a suggestion to the compiler, which `tsc` keeps to itself. */

import { basename } from 'node:path'
import { fileURLToPath } from 'node:url'
import ts from 'typescript'

const folder = fileURLToPath(new URL('.', import.meta.url))
const config = ts.readConfigFile(`${folder}/tsconfig.json`, ts.sys.readFile).config
const { fileNames, options } = ts.parseJsonConfigFileContent(config, ts.sys, folder)
const service = ts.createLanguageService({
  fileExists: ts.sys.fileExists,
  readFile: ts.sys.readFile,
  readDirectory: ts.sys.readDirectory,
  getCurrentDirectory: () => folder,
  getCompilationSettings: () => options,
  getDefaultLibFileName: ts.getDefaultLibFilePath,
  getScriptFileNames: () => fileNames,
  getScriptVersion: () => '1',
  getScriptSnapshot: (name) => {
    const text = ts.sys.readFile(name)
    return text === undefined ? undefined : ts.ScriptSnapshot.fromString(text)
  }
})
const scripts = fileNames.filter((name) => name.endsWith('.js'))
for (const name of scripts) {
  for (const { reportsDeprecated, file, start, messageText } of service.getSuggestionDiagnostics(name)) {
    if (!reportsDeprecated) continue
    const { line } = ts.getLineAndCharacterOfPosition(file, start)
    console.log(`${basename(name)}:${line + 1}: ${ts.flattenDiagnosticMessageText(messageText, ' ')}`)
  }
}
console.log(`${scripts.length} scripts`)
